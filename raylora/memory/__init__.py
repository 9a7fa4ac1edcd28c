"""Fitting a job onto a card: what it needs, what the card has, and what is done to make both meet.

`footprint` says what a step needs, from configs alone; `probe` what a card has; `plan` chooses;
`placed` does it to the models, and may be asked for more of it between two passes.
"""
