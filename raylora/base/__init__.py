"""The ground floor: errors, options, randomness, storage, logs. Imports nothing of raylora."""
