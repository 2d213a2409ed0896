"""Tools that every other folder may use: files, messages, processes, threads that share a device, autocast."""
