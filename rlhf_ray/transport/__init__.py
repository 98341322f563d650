"""Weights on their way from one process to others: cut into parcels, hashed at both ends."""
