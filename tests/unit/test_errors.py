from serve import errors


def all_classes(cls: type[errors.OctetError]) -> list[type[errors.OctetError]]:
    return [cls, *(sub for c in cls.__subclasses__() for sub in all_classes(c))]


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = [line.strip("│├└─ ").split() for line in (errors.__doc__ or "").splitlines()]
    rows = {row[0]: tuple(row[1:]) for row in drawn if len(row) == 4 and row[1].isdigit()}
    real = {c.__name__: (str(c.status), c.type, c.code) for c in all_classes(errors.OctetError)}
    assert rows == real
