"""PyInstaller's hook: modules are imported by name; the bundled model and kernels are data."""

from PyInstaller.utils.hooks import collect_data_files, collect_submodules, copy_metadata

# Those of backends whose libraries the application does not contain are left out.
hiddenimports = collect_submodules("sam3rt", on_error="ignore")
datas = (
    collect_data_files("sam3rt.default_bundle")
    + collect_data_files("sam3rt.backends.tensorrt")
    + copy_metadata("sam3rt")
)
