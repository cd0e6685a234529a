"""Training copies of a data set: `python -m umt_fast.data.prepare`."""
