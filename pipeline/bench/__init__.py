"""`sap bench`: what a step costs, in processes of their own, on random models and random rows."""
