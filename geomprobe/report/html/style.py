"""How a report's page looks: light and dark, on a phone, on a desk and on paper."""

from __future__ import annotations

LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, in which the figures are drawn; the page shows each as its variable --line-N."""

_LIGHT = """color-scheme: light;
  --page: #ffffff; --raised: #f5f6f8; --ink: #1b1f24; --soft: #59616b; --edge: #d5d9de;
  --link: #0b57a4; --alarm: #b00020; --good: #0a6b3d; --wait: #8a5300;
  --line-1: #0072b2; --line-2: #c25200; --line-3: #00815e; --line-4: #b0558a; --line-5: #a06a00; --line-6: #2a86bd;"""

_DARK = """color-scheme: dark;
  --page: #14171a; --raised: #1e2226; --ink: #e6e8ea; --soft: #a3abb3; --edge: #3a4046;
  --link: #7ab8f5; --alarm: #ff8a95; --good: #6fd39f; --wait: #f0b95a;
  --line-1: #5db3ec; --line-2: #ff9a52; --line-3: #3ccfa0; --line-4: #e79cc6; --line-5: #edb645; --line-6: #9fd4f7;"""

STYLE = f"""
:root {{ {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }}
body {{
  margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.3rem; line-height: 1.3; margin: 2.75rem 0 .75rem; }}
p {{ margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }}
a {{ color: var(--link); }}
:focus-visible {{ outline: 2px solid var(--link); outline-offset: 2px; }}
.of {{ color: var(--soft); margin: 0; letter-spacing: .02em; }}
nav ul {{ display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: 1.25rem 0 0; padding: 0; }}
.verdict {{
  margin-top: 1.25rem; padding: 1rem 1.25rem; background: var(--raised); border-radius: .4rem;
  border-left: .4rem solid var(--mark);
}}
.verdict h2 {{ margin: 0 0 .25rem; color: var(--mark); font-size: 1.35rem; overflow-wrap: anywhere; }}
.good {{ --mark: var(--good); }} .wait {{ --mark: var(--wait); }} .bad {{ --mark: var(--alarm); }}
dl {{ margin: .75rem 0 0; display: grid; grid-template-columns: max-content 1fr; }}
dl > div {{ display: grid; grid-template-columns: subgrid; grid-column: 1 / -1; column-gap: 1.5rem; padding: .2rem 0; }}
dt {{ color: var(--soft); }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
.figures {{
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21.5rem), 1fr)); gap: 1.75rem 1.5rem;
}}
figure {{ margin: 0; min-width: 0; break-inside: avoid; }}
figure svg {{ display: block; width: 100%; height: auto; color: var(--ink); }}
figcaption {{ font-size: .9rem; line-height: 1.45; color: var(--soft); overflow-wrap: anywhere; }}
figcaption strong {{ color: var(--ink); }}
.key {{ display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: .25rem 0 1rem; padding: 0;
  font-size: .9rem; color: var(--soft); overflow-wrap: anywhere; }}
.key svg {{ width: 1.75rem; height: .75rem; margin-right: .5rem; vertical-align: -.05rem; }}
.wide {{ overflow-x: auto; margin: .75rem 0; }}
.figures + .wide {{ margin-top: 1.75rem; }}
table {{
  border-collapse: collapse; min-width: min(100%, 20rem); font-size: .9rem; font-variant-numeric: tabular-nums;
}}
caption {{ text-align: left; color: var(--soft); padding-bottom: .4rem; }}
th, td {{ text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--edge); white-space: nowrap; }}
thead th {{ font-weight: 600; border-bottom: 2px solid var(--edge); }}
tbody th {{ font-weight: 500; position: sticky; left: 0; background: var(--page); }}
.n {{ text-align: right; }}
pre, code {{ font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }}
pre {{ margin: .5rem 0; padding: .75rem 1rem; background: var(--raised); border-radius: .4rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }}
summary {{ cursor: pointer; padding: .4rem 0; }}
footer {{
  margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--edge); color: var(--soft); font-size: .9rem;
}}
@media (max-width: 30rem) {{
  body {{ padding-top: 1.25rem; }}
  h1 {{ font-size: 1.5rem; }}
  dl, dl > div {{ display: block; }}
  dl > div {{ padding: .3rem 0; }}
  dt {{ font-size: .85rem; }}
}}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  nav {{ display: none; }}
  .figures {{ grid-template-columns: repeat(2, 1fr); }}
  .wide {{ overflow: visible; }}
  table {{ font-size: 7.5pt; }}
  th, td {{ padding-right: .4rem; }}
  tbody th {{ position: static; }}
  h2 {{ break-after: avoid; }}
  tr, .verdict, section > pre {{ break-inside: avoid; }}
  .verdict, pre {{ background: none; border: 1px solid var(--edge); }}
  .verdict {{ border-left: .4rem solid var(--mark); }}
}}
""".strip()
