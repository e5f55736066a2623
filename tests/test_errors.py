import pytest

from sdlora import errors


@pytest.mark.parametrize(
    ("kind", "parent", "status"),
    [
        (errors.SdloraError, Exception, 1),
        (errors.ConfigError, errors.SdloraError, 2),
        (errors.DataError, errors.SdloraError, 1),
        (errors.FormatError, errors.SdloraError, 1),
        (errors.ModelError, errors.SdloraError, 1),
        (errors.OutputError, errors.SdloraError, 1),
        (errors.NetworkError, errors.SdloraError, 1),
        (errors.TrainingError, errors.SdloraError, 1),
        (errors.GenerationError, errors.SdloraError, 1),
        (errors.GenerationCancelled, errors.GenerationError, 1),
    ],
)
def test_every_failure_has_its_parent_and_exit_status(kind, parent, status):
    assert kind.__mro__[1] is parent
    assert kind("why").exit_status == status
