"""What training reads: prompts in an order that can be redone, and feedback turned into pairs and ratings."""
