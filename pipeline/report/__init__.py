"""The report: table, figures and a self-contained page, from complete stage folders only."""
