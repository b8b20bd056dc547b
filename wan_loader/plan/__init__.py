"""Pure decisions: what is read, how, in which order, with how much memory. No file is opened here."""
