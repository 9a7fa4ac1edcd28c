"""What children of the fork server have imported already, so that each starts in a moment."""

import boto3  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch  # noqa: F401
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # noqa: F401

import raylora.local  # noqa: F401
