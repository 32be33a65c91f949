"""Small published folders and keys, for the tests of record, signature and verification."""

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_ntp.publishing.record import write_record

from ..conftest import tiny_vit


def minimal_record():
    """Valid but for "files", with numbers of every kind in it."""
    domain = {"dataset": "org/images", "config": None, "revision": "main", "fingerprint": {"train": "a" * 64}}
    interval = [-0.1, 0.2]
    area = {
        "nats": 0.5,
        "decades": 0.25,
        "normalized": 0.125,
        "ci": {"level": 0.95, "nats": interval, "decades": interval, "normalized": interval},
        "seeds": [0.1, 0.15],
    }
    return {
        "schema_version": 2,
        "library": {"name": "hf_ntp", "version": "0.1.0"},
        "environment": {"torch": "2.13.0"},
        "architecture": "ViTForImageClassification",
        "base_model": {"name": "org/base", "revision": None, "weights": {"model.safetensors": "b" * 64}},
        "authorized_domains": [{"name": "photos", "classes": ["cat", "dog"], **domain}],
        "unauthorized_domains": [{"name": "scans", "classes": ["x", "y"], **domain}],
        "terms": {"license": "other", "text": "Photos only."},
        "method": {"name": "non-transferable-pruning", "settings": {"rho": 0.5, "steps": 10, "seed": None}},
        "sparsity": {
            "requested": 0.7,
            "achieved": 0.7,
            "prunable_weights": 1000,
            "live": 0.69,
            "live_fraction": 0.99,
            "layers": {"encoder.weight": {"weights": 1000, "zeros": 700}},
        },
        "source_accuracy": {"measure": "classification", "before": 0.96, "after": 0.95, "images": 1250},
        "evidence": [
            {
                "domain": "scans",
                "sample_sizes": [10, 100],
                "seeds": [0, 1],
                "protocol": {"learning_rates": [0.001, 0.003], "epochs": 20},
                "scratch_convergence": {"sample_size": 100, "steps": 800, "accuracy": 0.6, "accuracy_3x": 0.61},
                "attacks": {"full": {"protected": area, "unprotected": None, "retained_transfer": 0.25}},
                "worst_case": {"attack": "full", "slc_auc": 0.125, "retained_transfer": 0.25},
            }
        ],
        "not_tested": ["Imitation of the model's outputs."],
    }


def make_keys(folder, curve=None):
    """PEM files "key.pem" and "key.pub.pem"; gives the paths of private and public key."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub.pem"
    private.write_bytes(private_pem(key))
    public.write_bytes(public_pem(key))
    return private, public


def private_pem(key, password=None):
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)


def public_pem(key):
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def make_folder(folder, seed=0):
    """A model as it is published: weights, processor, card, figure, results and record; not signed."""
    tiny_vit(seed=seed).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\n---\n# Photos only\n")
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(folder / "slc.png")
    (folder / "results.json").write_text('{"sparsity": 0.7}')
    write_record(folder, minimal_record())
    return folder
