"""Look-ups among records: a task whose right explanation is one token, and what methods make of it."""
