"""The parts that work: each a plain class with one duty; Ray is applied to them in `placement.py` alone."""
