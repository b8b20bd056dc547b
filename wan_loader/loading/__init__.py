"""One load in one process: plan it, carry it out, bind what has arrived, and say what was done."""
