from setuptools import setup

setup(package_dir={"icegrt": "engine", "icegrt.kernels": "kernels"}, packages=["icegrt", "icegrt.kernels"])
