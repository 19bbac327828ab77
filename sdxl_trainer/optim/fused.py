"""AdamW as one kernel over all tensors."""

import inspect

import torch

_Plain = torch.optim.AdamW


class AdamW(_Plain):
    """PyTorch's, without its compiler: to be kept out of these methods it would be imported, for as long as all of
    PyTorch takes. Nothing here is compiled."""

    add_param_group = inspect.unwrap(_Plain.add_param_group)
    state_dict = inspect.unwrap(_Plain.state_dict)
    load_state_dict = inspect.unwrap(_Plain.load_state_dict)
    zero_grad = inspect.unwrap(_Plain.zero_grad)
    step = torch.no_grad()(inspect.unwrap(_Plain.step))
