"""A classifier's answers to many image files, as a table."""
