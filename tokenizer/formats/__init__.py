"""What sets the checkpoints of other projects apart from ours: files, config, names, conventions.

    family     files                                          pixels      written by convert
    muse       config.json, pytorch_model.bin/.safetensors    [0, 1]      yes
    diffusers  config.json, diffusion_pytorch_model.*         in config   yes
    taming     model.ckpt or last.ckpt                        [-1, 1]     yes
    llamagen   one .pt                                        [-1, 1]     no

Each module maps names one way, ours to theirs: that serves reading, writing and error messages,
which speak of the names in the user's file.
"""
