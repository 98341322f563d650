"""The arithmetic of learning from feedback: pure functions on tensors, each with its formula and its source."""
