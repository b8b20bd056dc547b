"""Functions by which libraries read and write weights, each replaced by a seam.

from_diffusers      `from_pretrained` of diffusers
from_transformers   the same of transformers; transformers_four knows the older ones
wanted              weights that a library is about to give a model
from_safetensors    `load_file` and `safe_open` to a GPU; open_on_device is the file that stays open
torch_load          `torch.load`: to the CPU a mapping under a lease; torch_files knows which files
copies              `load_state_dict`, which gives parameters mappings where it would copy
rewrites            `torch.save` and others over a file that is mapped
read_ahead          a pipeline's components, into the page cache meanwhile
left_alone          why a call is left to the original
"""
