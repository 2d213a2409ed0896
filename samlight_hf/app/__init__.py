"""The page of `samlight app`: sessions without gradio, files to download, and the page itself."""
