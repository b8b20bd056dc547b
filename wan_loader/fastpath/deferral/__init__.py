"""Tensors whose values wait until somebody looks: casts of mapped weights, and random initialisation.

deferred          the ways in: defer_all, settle, is_deferred
deferred_tensor   the tensor that waits, a subclass of torch's for as long as it does
waiting_cast      the cast of a range of a file, which waits
waiting_init      an initialisation, which waits
module_casts      a module's cast on the CPU, in its own tensors
convertible       a tensor that a library is about to cast by a rule of its own
initial           the seam of `torch.nn.init`
mt19937           the state of torch's generator after many draws
settling, guards  functions that look without asking, before which what waits is settled
facts             functions of torch that ask what a tensor is, and those that give it all its values anew
"""
