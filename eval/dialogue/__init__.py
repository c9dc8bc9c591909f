"""Free-running dialogues with a scripted person: the script, the talking, what is measured by turn, the report."""
