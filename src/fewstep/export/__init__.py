"""Other formats: what leaves fewstep for programs that do not have it."""
