"""How the page looks, and its one keyboard shortcut."""

CSS = """
.gradio-container { width: 100% !important; max-width: 1200px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.5rem; font-weight: 700; margin: 0; letter-spacing: -0.01em; }

.hint, .hint p, .hint li, .hint summary { font-size: 0.85rem; opacity: 0.85; margin: 0; }
.hint ul { padding-left: 1.1rem; list-style: disc; overflow-wrap: anywhere; }
.hint summary { cursor: pointer; }

.status { min-height: 2.5rem; display: flex; flex-direction: column; justify-content: flex-end; }
.status p { margin: 0.25rem 0 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.status.error p { color: var(--error-text-color, #b91c1c); }
.status .bar { height: 6px; border-radius: 3px; overflow: hidden; background: var(--border-color-primary); }
.status .bar div { height: 100%; background: var(--color-accent); transition: width 0.15s linear; }

#cancel:disabled {
  background: var(--button-secondary-background-fill);
  color: var(--button-secondary-text-color);
}

.empty {
  display: grid; place-items: center; height: 480px; width: 100%;
  border: 2px dashed var(--border-color-primary); border-radius: var(--radius-lg);
}
.empty span { opacity: 0.7; }
/* Small pictures fill the column; large ones stay in sight. */
#picture .image-container > button, #picture .image-frame { width: 100%; }
#picture .image-frame img { width: 100% !important; height: auto; max-height: 640px; object-fit: contain; }
.sides { display: flex; justify-content: space-between; gap: 1rem; overflow-wrap: anywhere; }

#work > * { min-width: min(280px, 100%) !important; }
@media (max-width: 700px) {
  /* One column, the picture before the settings. */
  #work { flex-direction: column-reverse; flex-wrap: nowrap; }
  #work > * { width: 100%; max-width: 100%; flex: none; }
  .empty { height: 240px; }
}
"""

HEAD = """
<script>
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    document.querySelector("#generate:not([disabled])")?.click();
  }
}, true);
</script>
"""
