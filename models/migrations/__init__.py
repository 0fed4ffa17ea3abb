"""The history of the tables; expand first, contract a release later, so that old and new processes run side by side."""
