"""`sap doctor`: whether the SAP step does what it says, on a user's own model and cluster, in minutes."""
