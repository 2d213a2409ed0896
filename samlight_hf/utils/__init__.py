"""What every other folder may use: files that are whole or not there, messages, autocast."""
