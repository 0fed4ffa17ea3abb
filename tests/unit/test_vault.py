"""Encryption bound to an object: only the permitted secrets decrypt a value, and only for the object of its
encryption.
"""

import re

import pytest

from models.encryption import EncryptedText, SecretCorrupted, SecretVault, UnknownSecret, identify_secret

OLD, NEW = b"the old secret, longer than thirty-two", b"the new secret, longer than thirty-two"
TEXT = b'{"password":"canary-3f9c"}'
HERE = {"organization_id": "org_1", "object_id": "ds_1"}


def test_an_encrypted_text_is_decrypted_and_reveals_nothing() -> None:
    vault = SecretVault(NEW)
    encrypted = vault.encrypt(TEXT, **HERE)
    assert b"canary" not in encrypted.content
    assert vault.decrypt(encrypted, **HERE) == TEXT
    assert SecretVault(NEW).decrypt(encrypted, **HERE) == TEXT


def test_the_same_text_is_never_sealed_the_same_way_twice() -> None:
    vault = SecretVault(NEW)
    assert len({vault.encrypt(TEXT, **HERE).content for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"organization_id": "org_2", "object_id": "ds_1"},
        {"organization_id": "org_1", "object_id": "ds_2"},
        {"organization_id": "org_1\nds_1", "object_id": ""},
        {"organization_id": "org_1ds_1", "object_id": ""},
    ],
)
def test_a_text_encrypted_for_one_object_cannot_be_decrypted_for_another(elsewhere: dict[str, str]) -> None:
    vault = SecretVault(NEW)
    with pytest.raises(SecretCorrupted):
        vault.decrypt(vault.encrypt(TEXT, **HERE), **elsewhere)


def test_a_fingerprint_cannot_be_computed_without_the_server_secret_or_for_another_object() -> None:
    vault = SecretVault(NEW)
    shown = vault.fingerprint(TEXT, **HERE)
    assert re.fullmatch("[0-9a-f]{12}", shown)
    assert SecretVault(NEW).fingerprint(TEXT, **HERE) == shown
    others = {
        SecretVault(OLD, [NEW]).fingerprint(TEXT, **HERE),
        vault.fingerprint(TEXT + b" ", **HERE),
        vault.fingerprint(TEXT, organization_id="org_2", object_id="ds_1"),
        vault.fingerprint(TEXT, organization_id="org_1", object_id="ds_2"),
    }
    assert len(others - {shown}) == 4


def test_every_byte_counts() -> None:
    vault = SecretVault(NEW)
    encrypted = vault.encrypt(TEXT, **HERE)
    for place in range(len(encrypted.content)):
        changed = bytearray(encrypted.content)
        changed[place] ^= 1
        with pytest.raises(SecretCorrupted):
            vault.decrypt(EncryptedText(encrypted.secret_id, bytes(changed)), **HERE)
    for length in range(len(encrypted.content)):
        with pytest.raises(SecretCorrupted):
            vault.decrypt(EncryptedText(encrypted.secret_id, encrypted.content[:length]), **HERE)


def test_an_earlier_secret_decrypts_its_texts_while_it_is_listed() -> None:
    encrypted = SecretVault(OLD).encrypt(TEXT, **HERE)
    both = SecretVault(NEW, [OLD])
    assert both.decrypt(encrypted, **HERE) == TEXT
    assert both.encrypt(TEXT, **HERE).secret_id == identify_secret(NEW)
    with pytest.raises(UnknownSecret, match="PILOTFLAME_SECRET_KEY"):
        SecretVault(NEW).decrypt(encrypted, **HERE)
    with pytest.raises(SecretCorrupted):
        both.decrypt(EncryptedText(identify_secret(NEW), encrypted.content), **HERE)


def test_the_id_of_a_secret_tells_nothing_of_it() -> None:
    assert re.fullmatch("[0-9a-f]{16}", identify_secret(OLD))
    assert identify_secret(OLD) != identify_secret(NEW)
