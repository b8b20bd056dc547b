"""The part of the profiler that runs inside a foreign program.

It is copied next to a sitecustomize, so it imports only the standard library and itself, works on any Python from 3.9,
and never raises into the program.

    boot           starts the recording
    recorder       keeps spans and writes them down
    import_hooks   times modules, and calls the other hooks when a module has arrived
    torch_hooks    copies, conversions, construction, random initialisation, loading, sharding, CUDA's start
    file_hooks     files of weights that Python opens, and what it reads of them
    process_hooks  ends of processes
    own_hooks      loads of wan_loader
    weight_hooks   safetensors, transformers and diffusers
    wrap           wrappers that leave no trace
"""
