"""What would catch a lie about durability: simulated disks, killed processes, injected faults, checkers.

``scripts/campaign`` runs what is here; the tests beside it run short forms of the same code.
"""
