"""Speed and memory of the model beside its peers, in one run: `samlight benchmark`."""
