"""Style and script of the contact sheet's page, which has both inside."""

STYLE = """
:root { color-scheme: light dark; --paper: #fafaf9; --tile: #fff; --ink: #1c1917; --faint: #6f6963; --line: #e7e5e4;
  --well: #efedeb; --error: #b91c1c; --warning: #92600a; --note: #1d4ed8; --fine: #15803d; --accent: #1d4ed8; }
@media (prefers-color-scheme: dark) { :root { --paper: #18181b; --tile: #232327; --ink: #f4f4f5; --faint: #a1a1aa;
  --line: #3f3f46; --well: #0f0f11; --error: #f87171; --warning: #fbbf24; --note: #93c5fd; --fine: #4ade80;
  --accent: #93c5fd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1720px; padding: 24px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
p { margin: .25rem 0; }
.faint { color: var(--faint); }
.verdict { font-weight: 600; margin: .6rem 0; }
.error { color: var(--error); } .warning { color: var(--warning); } .note { color: var(--note); } .fine { color: var(--fine); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 40px; align-items: start; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: 3px 10px 3px 0; text-align: left; font-weight: normal; vertical-align: top; }
td.number { text-align: right; white-space: nowrap; }
td.bar { width: 40%; } td.bar div { background: var(--accent); opacity: .75; height: .8em; border-radius: 2px; margin-top: .3em; }
details { border-top: 1px solid var(--line); padding: 6px 0; } details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; } summary b { display: inline-block; min-width: 5em; }
details ul { margin: .4rem 0 .4rem 1.2rem; padding: 0; } li { overflow-wrap: anywhere; }
a { color: var(--accent); }
.filters { background: var(--paper); padding: 10px 0; border-bottom: 1px solid var(--line); }
@media (min-width: 900px) and (min-height: 700px) { .filters { position: sticky; top: 0; z-index: 1; max-height: 35vh;
  overflow: auto; } figure { scroll-margin-top: 37vh; } }
.filters[hidden] { display: none; }
.filters div { display: flex; flex-wrap: wrap; gap: 6px; margin: 4px 0; }
.filters span { align-self: center; min-width: 4.5em; color: var(--faint); }
button { font: inherit; font-size: .86rem; color: inherit; background: var(--tile); border: 1px solid var(--line); border-radius: 999px;
  padding: 2px 11px; cursor: pointer; }
button[aria-pressed=true] { background: var(--ink); color: var(--paper); border-color: var(--ink); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--side), 1fr)); gap: 18px; margin-top: 18px; }
figure { margin: 0; background: var(--tile); border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: auto 460px; }
figure[hidden] { display: none; } figure:target { outline: 3px solid var(--accent); }
.well { background: var(--well); aspect-ratio: 1; display: flex; align-items: center; justify-content: center; }
.well img { max-width: 100%; max-height: 100%; height: auto; display: block; }
figcaption { padding: 8px 12px 12px; font-size: .88rem; overflow-wrap: anywhere; }
figcaption .name { font-weight: 600; }
.caption { margin-top: 6px; white-space: pre-wrap; } mark { background: #fde68a; color: #1c1917; border-radius: 3px; padding: 0 2px; }
.badges { display: flex; flex-wrap: wrap; gap: 5px; margin-top: 8px; }
.badge { border: 1px solid currentColor; border-radius: 4px; padding: 0 6px; font-size: .78rem; } .badge a { color: inherit; }
"""

SCRIPT = """
const bar = document.querySelector('.filters'), cards = [...document.querySelectorAll('figure')];
const left = document.querySelector('#left'), chosen = {};
bar.hidden = false;
function show() {
  let shown = 0;
  for (const card of cards) {
    const has = card.dataset.is.split(' ');
    card.hidden = !Object.values(chosen).every(mark => !mark || has.includes(mark));
    shown += !card.hidden;
  }
  left.textContent = shown + ' of ' + cards.length + ' shown';
}
bar.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  const { group, mark } = button.dataset;
  if (group) chosen[group] = chosen[group] === mark ? '' : mark;
  else for (const name in chosen) chosen[name] = '';
  for (const other of bar.querySelectorAll('button[data-group]'))
    other.setAttribute('aria-pressed', chosen[other.dataset.group] === other.dataset.mark);
  show();
});
// A link to a picture that is filtered out shows it again.
addEventListener('hashchange', () => {
  const card = document.querySelector(location.hash);
  if (card && card.hidden) { bar.querySelector('button').click(); card.scrollIntoView(); }
});
show();
"""
