"""`flow-pl compare`: train and test several configurations with several seeds; one table and a few figures."""
