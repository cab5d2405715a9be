// Shorthand for the elements of the page.

export const find = id => document.getElementById(id);

// make("button", { type: "button", onclick, class: "x", "aria-label": "…" }, ...children)
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element[name] = value;
    else if (value !== false && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export const picture = (src, alt) => make("img", { src, alt, draggable: "false" });
