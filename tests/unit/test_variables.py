"""Environment variables that resemble settings: those of any process are known, and others are reported."""

from pydantic_settings import BaseSettings

from bridge.smtp_settings import SmtpListenerSettings
from docs.settings_reference import BRIDGES, PROCESSES
from pilotflame import unknown_variables


def test_the_settings_of_every_process_are_known() -> None:
    settings: list[type[BaseSettings]] = [*PROCESSES.values(), *BRIDGES, SmtpListenerSettings]
    names = {f"PILOTFLAME_{name.upper()}" for one in settings for name in one.model_fields}
    assert unknown_variables.known_variables() == names | unknown_variables.OF_COMMANDS
    assert unknown_variables.find_unknown([*names, "pilotflame_port", "HOME", "PILOT"]) == {}


def test_likely_intended_names_are_suggested() -> None:
    found = unknown_variables.find_unknown(["PILOTFLAME_PROT", "pilotflame_log_levels", "PILOTFLAME_COLOR"])
    assert found["PILOTFLAME_PROT"] == ["PILOTFLAME_PORT"]
    assert found["pilotflame_log_levels"] == ["PILOTFLAME_LOG_LEVEL"]
    assert found["PILOTFLAME_COLOR"] == []
    assert unknown_variables.warning_text("PILOTFLAME_A", ["PILOTFLAME_B", "PILOTFLAME_C"]) == (
        "PILOTFLAME_A is not a setting: did you mean PILOTFLAME_B or PILOTFLAME_C?"
    )
    assert unknown_variables.warning_text("PILOTFLAME_A", []) == "PILOTFLAME_A is not a setting"


def test_service_variables_of_kubernetes_are_no_misspelled_settings() -> None:
    links = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR"]
    names = [f"PILOTFLAME_GATEWAY_{link}" for link in links]
    assert unknown_variables.find_unknown(names) == {}
    assert set(unknown_variables.find_unknown([*names, "PILOTFLAME_GATEWAY_ADDRESS"])) == {
        "PILOTFLAME_GATEWAY_ADDRESS"
    }
