"""The classes of ``Glyphs``: code points by split, script and faces. Written by ``tools/select_glyphs.py``.

A row is (faces, code points): bit i of ``faces`` stands for ``drawing.FACES[i]``; code points and ranges are in
hexadecimal. Chosen with matplotlib 3.11.2.
"""

MATPLOTLIB = "3.11.2"

# fmt: off
ALPHABETS: dict[str, dict[str, tuple[tuple[int, str], ...]]] = {
    "train": {
        "DIGIT": (
            (0xFFFF, "0030-0039"),
        ),
        "LATIN": (
            (0xFFFF, "0041-004E 0050-005A 0061-0062 0064-0067 0069-006B 006D-0072 0074-0075 0079 00C6 "
                     "00D8 00DE-00DF 00E6 00F0 00FE 0127 0138 0142 014A "
                     "0152-0153 0188 0190 0192 0195 019B 019E 01AA-01AB 01BE "
                     "01C1-01C3 0250-0252 0255-0258 025A 025D-0260 0264-0267 026B-026C 026E-0273 0277-0279 "
                     "027B-027F 0281-0282 0284-0288 028B-028E 0290-0291 0293-0298 029A 029D-029E 02A0 "
                     "02A3-02A8"),
            (0xFBFF, "01BA"),
            (0x1FFF, "0221 0234-0236 02AE-02AF 1D85"),
            (0x1000, "1D81 1D84 1D8A 1D8D-1D8E"),
            (0x0FFF, "0181-0184 0186-0187 018A-018C 018E-018F 0191 0193-0194 0196 019C-019D 01A2-01A4 "
                     "01A6-01A7 01A9 01AE 01B1-01B2 01B4 01B6-01B8 01BC-01BD 01BF 01F6 "
                     "021C 0224-0225 0238-023B 023D-0241 0244 024D 02A9-02AC 1D08 1D14 "
                     "1D16-1D17 1D1D-1D1F 1D7B 1E9F 2C64 2C6E 2C75 2C77 2C79 "
                     "2C7E A726 A78D A790-A791 A7AA"),
            (0x0F0F, "A722 A724 A78E"),
            (0x05FF, "02AD"),
            (0x00FF, "01F7 0222-0223 0242 0246-0247 024A-024B 024E 1D03 1D06 1D0A "
                     "1D0C 1D0E 1D11-1D13 1D19-1D1A 1D7D 1E9E 1EFA-1EFB 2C67-2C6C 2C71-2C72 "
                     "A728-A729 A732 A734 A736-A739 A73C-A73D A73F A741 A746-A747 A74B "
                     "A74E A780 A782 A7FB-A7FD A7FF"),
            (0x00F0, "1D15 1D24-1D25 1D7C 1D7F A72C A72E-A72F A786"),
            (0x000F, "2C65-2C66 2C74 A748-A749 A750-A753 A765-A767 A7A0 A7A2-A7A6 A7A9"),
        ),
        "GREEK": (
            (0xFFFF, "0393-0394 039E 03A6 03A8-03A9 03B2 03B6 03BB-03BE 03C0 03C2-03C4 "
                     "03C6-03C7 03C9 03D8-03DB 03DE-03E1"),
            (0x0FFF, "03D7 03FA-03FB"),
            (0x00FF, "0372-0373 0376 037C 03CF"),
        ),
        "COPTIC": (
            (0x000F, "03E2-03E3 03E6-03E8 03EA 03EC 03EE"),
        ),
        "CYRILLIC": (
            (0xFFFF, "0402 0409-040B 040F 0414 0416 041B 0426 0429-042B 042E-042F "
                     "0449 044C 0452 0462-0463 0490"),
            (0xF0FF, "046A 0474"),
            (0x0FFF, "0493-0494 0496 0498 049B 04A4 04AA-04AC 04B1-04B2 04BA 04C3 "
                     "04CB"),
            (0x00FF, "0464 046C 0470-0471 048D 049E 04A0 04A6 04B5-04B6 0512 "
                     "0514 A650-A651 A654 A656-A657"),
            (0x000F, "0466 0468 046E 0478-047A 047C 047E 0480 048A 04A8 "
                     "04B9 04BC 04BE 04C5 04CA 04CD 04FA-04FB 04FD 04FF-0500 "
                     "0502-0506 0508 050E-050F 0516-0519 051E 0520 0522 0525 A64C "
                     "A662 A664 A666 A66A A66E"),
        ),
        "OLD": (
            (0x000F, "10301-10302 10304-10305 10308 1030A-1030E 10310 10312-10316 10319 1031B-1031D"),
        ),
        "LISU": (
            (0x000F, "A4D5 A4D8 A4DE A4E8-A4E9 A4ED A4EF"),
        ),
        "CANADIAN": (
            (0x000F, "1401-1402 1404-1406 140A-1415 1417-141A 1425-1426 142B-142E 1430 1432-1434 1438-1447 "
                     "144D 144F 1451 1454-1465 1469-146A 146C 146E 1470-1482 1484-1486 "
                     "1488-14A0 14A6-14A9 14AB-14BA 14C0-14C5 14C7-14CE 14D3-14D8 14DA-14EA 14EC-14F1 14F3-14FC "
                     "1501-1504 1510-1524 1526-153D 1542-154F 1552-155C 155E-1564 1566-1568 156A 1574-157A "
                     "157E-1585 158A-1596 15A0 15A2-15A5 15A7-15AA 15AC-15AD 1647 166F-1676"),
        ),
    },
    "validation": {
        "ARMENIAN": (
            (0x0FFF, "0534-0539 053B 053E-0543 0546-0547 0549-054C 054E 0552 0554 0556 "
                     "0567 056D-056E 0571 0573 0579 057B 0586"),
        ),
        "HEBREW": (
            (0x000F, "05D0-05D1 05D3-05D4 05D6 05DC 05E2 05E5-05E7 05E9"),
            (0x000A, "05F2"),
        ),
        "NKO": (
            (0x0003, "07C1-07C2 07C4 07C6-07C9 07CF-07D2 07D4 07D6-07D8 07DA 07DD-07DF 07E2-07E4"),
        ),
    },
    "test": {
        "GEORGIAN": (
            (0x0FFF, "10D0 10D3-10D4 10D9-10DA 10DD-10E0 10E2-10E6 10E8-10EA 10EC-10ED 10EF-10F0 10F2-10F5 "
                     "10F7 10F9-10FA"),
            (0x00FF, "10A0 10A2-10A5 10A7-10AB 10AE 10B0-10B2 10B5 10BB-10BC 10BE-10C1 10C3-10C5 "
                     "2D00-2D06 2D08 2D0B 2D0F 2D12-2D13 2D15 2D18-2D19 2D1B-2D1D 2D1F "
                     "2D21-2D25"),
        ),
        "TIFINAGH": (
            (0x0003, "2D33 2D3B-2D3F 2D43-2D48 2D4B-2D4C 2D4E 2D50 2D52-2D53 2D55-2D58 2D5A "
                     "2D5C 2D5E 2D62-2D64"),
        ),
        "LAO": (
            (0x0F0F, "0E81-0E82 0E87 0E8A 0E99 0E9C-0E9E 0EA1 0EA3 0EA7 0EAA "
                     "0EAD-0EB0 0EB2"),
            (0x000F, "0EBD 0EC0-0EC4 0ED1-0ED9"),
        ),
        "ARABIC": (
            (0x0303, "0621 0624 0626 0628-062C 062E-0637 0639-063A 0641-0643 0645-0646 0648-064A "
                     "0679 067B 0691 06A4 06A9 06AF 06BE FB53-FB55 FB58 "
                     "FB5D FB5F-FB61 FB64 FB67-FB69 FB6B FB6D FB73-FB75 FB78-FB79 FB8B "
                     "FB8F-FB91 FB94-FB95 FB9F FBAB-FBAD FBFD-FBFF FE88 FE8A-FE8C FE90-FE92 FE94 "
                     "FE96-FE98 FEA0 FEA4 FEA6 FEA8 FEAA FEAE FEB0 FEB2-FEB4 "
                     "FEB7-FEB8 FEBB-FEBC FEBF-FEC0 FEC2 FECA-FECC FECE-FED0 FED2 FED4 FED6 "
                     "FEDA FEDE FEE2 FEE4 FEE6-FEE7 FEEA FEEE FEF2"),
            (0x0302, "FBE9"),
            (0x0203, "FB6C FE9F FEA3 FEA7 FED3"),
            (0x0202, "0647"),
            (0x0003, "066E-066F 067C 0681 0688-068B 068E 0692-0693 0695-0696 069A 06A0-06A2 "
                     "06A5 06A8 06AA 06AD-06AE 06B2-06B4 06B8-06BB 06BD 06D0 FB83 "
                     "FB85 FB87 FB98-FB99 FB9B FBA1 FBD4-FBD6 FBD8 FBE5"),
            (0x0001, "1EE21 1EE29-1EE2B 1EE2D 1EE36 1EE61-1EE62 1EE64 1EE67-1EE68 1EE6A 1EE6C "
                     "1EE6E-1EE71 1EE75"),
        ),
        "ARABIC-INDIC": (
            (0x0303, "0661-0664 0669"),
        ),
        "EXTENDED": (
            (0x0303, "06F4 06F6"),
        ),
    },
}
# fmt: on
