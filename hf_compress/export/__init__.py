"""What is written for others: reloadable models, integer formats, cards, the Hub."""
