"""Model cards: every sentence, picture and number of them."""
