"""Networks of a pipeline as modules on meta, as a start makes them."""

from wan_pipeline import modules


def built(component, dtype, **options):
    """The module of a component, in the dtypes that it will have once filled."""
    module = modules.build(component, **options)
    modules.set_dtypes(module, component, dtype)
    return module
