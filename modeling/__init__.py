# SPDX-License-Identifier: Apache-2.0
"""Model code that is uploaded to the Hub next to the weights. It imports only torch, transformers and its siblings."""
