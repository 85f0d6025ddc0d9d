"""The weights w* that a replay measures against: kept by pass 1, loaded by pass 2."""
