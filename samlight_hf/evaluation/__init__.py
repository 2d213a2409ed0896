"""Zero-shot evaluation of any Segment Anything model, with the protocol beside every number."""
