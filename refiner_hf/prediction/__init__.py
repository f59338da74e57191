"""AnswerTable of an image classifier to many files, as a table."""
