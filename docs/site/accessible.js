"use strict";
(() => {
  const search = document.querySelector(".md-search[role=dialog]");
  if (search) search.setAttribute("aria-label", "Search");
  // A table or a listing that is wider than the page scrolls by keys too: the tab key reaches it.
  const regions = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const scrolls = target.scrollWidth > target.clientWidth;
      const name = target.querySelector("table") ? "Table" : "Code";
      for (const [attribute, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", name]]) {
        if (scrolls) target.setAttribute(attribute, value);
        else target.removeAttribute(attribute);
      }
    }
  });
  const watched = new WeakSet();
  const watch = () => {
    for (const region of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code")) {
      if (!watched.has(region)) { watched.add(region); regions.observe(region); }
    }
  };
  watch();
  new MutationObserver(watch).observe(document.body, { childList: true, subtree: true }); // the theme wraps tables later
})();
