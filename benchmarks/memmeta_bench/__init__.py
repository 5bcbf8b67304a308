"""What memmeta costs next to batched MAML and its peers, on the same work, in one run: ``memmeta bench``.

Each measured point runs in its own fresh process. ``import memmeta`` never imports this package.
"""
