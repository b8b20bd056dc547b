"""Where the time of a start goes, in a notebook: cells as Jupyter, VS Code and PyCharm know them (`# %%`).

The model is named by MODEL, and the device by DEVICE, in the environment; or change the first cell.
"""

# %% What is loaded, and where to
import os

MODEL = os.environ.get("MODEL", "Wan2.2-T2V-A14B-Diffusers")
DEVICE = os.environ.get("DEVICE", "cuda")

# %% As it is: the profile sees imports, reads, casts and copies of libraries that know nothing of it
import wan_loader

with wan_loader.profile() as as_it_is:
    import torch
    from diffusers import WanTransformer3DModel

    expert = WanTransformer3DModel.from_pretrained(MODEL, subfolder="transformer", torch_dtype=torch.bfloat16)
    expert.to(DEVICE)
as_it_is.report()

# %% The same lines with the loader inside
del expert
with wan_loader.profile() as fast, wan_loader.accelerate() as accelerator:
    expert = WanTransformer3DModel.from_pretrained(MODEL, subfolder="transformer", torch_dtype=torch.bfloat16)
    expert.to(DEVICE)
fast.report()
print(accelerator.tally.report())

# %% The numbers themselves: the document that `wan-loader profile -o` writes
document = fast.session.to_json()
for phase in document["phases"]:
    print(f"{phase['name']:12} {phase['busy_s']:8.3f} s")
