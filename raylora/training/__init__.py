"""The trainer: one page for a step, a loop around it, and what makes it exact on any fleet."""
