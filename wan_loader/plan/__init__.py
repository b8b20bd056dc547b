"""Pure decisions: which bytes are read, how, in which order, with how much memory. No file is opened here."""
