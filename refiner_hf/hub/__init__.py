"""What makes a folder ready for the Hub: the card, its pictures, and the code."""
