"""What is trained on top of a base: attaching it, naming it, writing it, proving it."""
